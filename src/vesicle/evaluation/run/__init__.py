"""What is asked for, and running it so that it may be killed at any moment and goes on."""
