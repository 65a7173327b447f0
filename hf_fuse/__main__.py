from hf_fuse.cli import main

if __name__ == "__main__":
    main()
