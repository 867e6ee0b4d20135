"""Training: a loop that reads top to bottom, its schedules, checkpoints and history."""
