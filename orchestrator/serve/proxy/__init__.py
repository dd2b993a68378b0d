"""What runs in Ray Serve's proxies, before and around a replica."""
