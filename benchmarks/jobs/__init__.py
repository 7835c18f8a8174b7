"""What is measured without HTTP, each in a process of its own."""
