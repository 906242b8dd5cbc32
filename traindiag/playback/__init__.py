"""Rules over logs that are already there: ours as the run was judged, other people's as far as their names tell."""
