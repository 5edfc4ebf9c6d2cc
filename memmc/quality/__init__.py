"""The quality gate: judges images, one by one and against a cohort's normals; numpy only."""
