"""Floor 3: what has been measured or planned, drawn. No torch."""
