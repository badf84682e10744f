"""What makes the algorithm practical. No paper is needed to read it; it knows the methods only through their table."""
