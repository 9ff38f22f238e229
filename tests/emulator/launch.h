extern "C" int launch_attend(const void* p, int grid, int block) { return launch([=] { attend(*(const Params*)p); }, grid, block); }
extern "C" int launch_merge_1(const void* p, int grid, int block) { return launch([=] { merge_1(*(const Params*)p); }, grid, block); }
extern "C" int launch_merge_4(const void* p, int grid, int block) { return launch([=] { merge_4(*(const Params*)p); }, grid, block); }
