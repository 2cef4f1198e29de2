from tpctl.start import main

main()
