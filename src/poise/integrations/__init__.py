"""Floor 7: the formats and extension points of the engines that people run."""
