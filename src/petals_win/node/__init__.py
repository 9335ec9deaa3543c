"""A PC that serves blocks: its sessions, its budget, its announcements, its life. Does not know HTTP or clients."""
