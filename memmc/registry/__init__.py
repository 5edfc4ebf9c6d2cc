"""MLflow behind one seam: runs, models, aliases."""
