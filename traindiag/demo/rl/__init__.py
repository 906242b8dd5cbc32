"""Two critics on the same task: one learns, one was ruined before it could."""
