"""What a build delivers: a folder with a manifest, its digest and signature, and what it will take of memory."""
