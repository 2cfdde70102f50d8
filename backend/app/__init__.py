"""The web only: HTTP, the durable job queue and the page (DESIGN 4.6). What a job does is ``backend.tryon``."""
