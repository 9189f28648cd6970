"""What neurons fire at, in words, and whether the words tell where they fire."""
