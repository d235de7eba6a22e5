"""From a folder of pictures to samples that training reads: scan, captions, buckets, and a cache on disk."""
