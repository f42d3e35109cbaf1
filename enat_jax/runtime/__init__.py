"""How a program starts, shares work, writes files, tells its progress and ends."""
