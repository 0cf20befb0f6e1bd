#if defined(_WIN32)

/* Nothing to prepare: this spares the C run-time's own start-up code, which zig would compile for a minute. */
int __stdcall DllMainCRTStartup(void* module, unsigned reason, void* reserved) {
  (void)module;
  (void)reason;
  (void)reserved;
  return 1;
}

#endif
