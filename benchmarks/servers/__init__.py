"""What is measured over HTTP: penstock's producers, and what one would take instead of penstock."""
