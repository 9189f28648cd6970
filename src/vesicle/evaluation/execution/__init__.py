"""Who runs an item, and items as token ids."""
