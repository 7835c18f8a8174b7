"""The main job, to watch: `penstock demo`."""
