from tpctl.cli.app import main

main()
