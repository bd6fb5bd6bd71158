"""What a network gives for views of images, and the cache of it."""
