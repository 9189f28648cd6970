"""What each command does: options, checks before anything heavy is loaded, and calls into the library."""
