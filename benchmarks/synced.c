/* What DCMTK's storescp lacks to be durable: fsync of each file, and of its folder, before the file
 * is closed, which is before the response is sent. To be preloaded (LD_PRELOAD) by benchmarks.peers.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void sync_with_folder(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    fsync(file);
    if (length <= 0) return;
    path[length] = '\0';
    *strrchr(path, '/') = '\0';
    int folder = open(path, O_RDONLY | O_DIRECTORY);
    if (folder < 0) return;
    fsync(folder);
    close(folder);
}

int fclose(FILE *stream) {
    int (*original)(FILE *) = (int (*)(FILE *))dlsym(RTLD_NEXT, "fclose");
    int file = fileno(stream), flags = fcntl(file, F_GETFL);
    struct stat about;
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && !fstat(file, &about) &&
        S_ISREG(about.st_mode)) {
        fflush(stream);
        sync_with_folder(file);
    }
    return original(stream);
}
