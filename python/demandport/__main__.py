from demandport.cli import main

raise SystemExit(main())
