"""How a clock is set right on each system. Does not know what time it is."""

CLOCK_FIX = (
    "Set the clocks of both PCs by the internet. Windows: Settings > Time & language > Date & time > Sync now. "
    "Linux: sudo timedatectl set-ntp true. macOS: System Settings > General > Date & Time."
)
