"""The driver's side of training: a group of workers placed, started, followed, started again."""
