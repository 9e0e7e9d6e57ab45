"""``python -m flame_services.scheduler``."""

from flame_services.scheduler import main

main()
