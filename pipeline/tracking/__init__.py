"""What MLflow sees: journals on their way there, the tree of a comparison, the champion.

The only room that imports mlflow. No stage imports it or waits for it, so nothing is stale when it changes. What a stage tells is
written by `harness.journal`.
"""
