"""Medical images from AWS HealthImaging in notebooks, training loops and batch jobs."""
