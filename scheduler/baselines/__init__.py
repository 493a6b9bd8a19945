"""Other ways to place the model, each in its own file: what the planner's plan is measured against."""
