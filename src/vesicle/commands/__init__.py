"""What each command does: its options, early checks, and calls into the library."""
