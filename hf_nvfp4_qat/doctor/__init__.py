"""What is, or may go, wrong with a packed checkpoint, whoever wrote it: checks, reports, repairs."""
