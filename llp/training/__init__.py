"""From a job to its learning curve: recipe, loop, schedules, checkpoints, outcomes."""
