"""Programs that helper processes run."""
