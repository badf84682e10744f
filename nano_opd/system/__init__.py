"""What makes the algorithm practical. No paper is needed to read it; of the methods it knows their table alone."""
