"""``python -m flame_services.executor_manager``."""

from flame_services.executor_manager import main

main()
