"""How a program starts, shares work, writes files, shows its progress and ends."""
