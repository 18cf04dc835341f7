from fastar_controller.cli import main

main()
