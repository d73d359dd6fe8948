"""What a run will take: parameters, time, memory."""
