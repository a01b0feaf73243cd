"""What both sides share: partitions, bottlenecks, the schedule, stages, optimizers, metrics."""
