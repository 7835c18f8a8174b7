"""penstock beside what one would take instead: `just bench`, one module per question in `questions/`."""
