"""What a run works on, and the record of what it did."""
