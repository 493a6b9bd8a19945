"""What there is, and how fast: every node of a Ray cluster asked and measured, as a cluster file and a cost table.

`survey` asks and measures, `kinds` makes device types of what was found, `describe` writes the cluster file, and
`calibrate` and `table` time a model's own layers for the planner.
"""
