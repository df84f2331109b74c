/* fb_cpus.c - how many CPUs this process may use: its affinity, cut to the CPU quotas of its cgroups.
 *
 * The quota of a group holds for all groups inside it. So the smallest one counts on the way from the group of the
 * process (/proc/self/cgroup) up to the root of a mount that shows it (/proc/self/mountinfo). What cannot be read or
 * understood is no quota: a wrong count costs time only.
 */
#define _GNU_SOURCE /* sched_getaffinity, getline, strsep */
#include "fb_internal.h"

#ifdef __linux__
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- quotas; 0: none */

static long long smaller(long long a, long long b)
{
    return a == 0 || (b > 0 && b < a) ? b : a;
}

/* The file root/folder/name; to be closed if it is not NULL. */
static FILE *open_file(const char *root, const char *folder, const char *name)
{
    const size_t bytes = strlen(root) + strlen(folder) + strlen(name) + 3;
    char *path = malloc(bytes);
    FILE *file = NULL;
    if (path) {
        snprintf(path, bytes, "%s/%s/%s", root, folder, name);
        file = fopen(path, "re");
    }
    free(path);
    return file;
}

/* The next line without its end; 0 at the end of the file. Lines may be long: nothing here is on the stack. */
static int next_line(FILE *file, char **line, size_t *size)
{
    if (!file || getline(line, size, file) < 0)
        return 0;
    (*line)[strcspn(*line, "\n")] = '\0';
    return 1;
}

static long long number(const char *text)
{
    char *end;
    const long long n = text && *text >= '0' && *text <= '9' ? strtoll(text, &end, 10) : 0;
    return n > 0 && *end == '\0' ? n : 0; /* "max" and -1 say that there is none */
}

/* The quota of one group, in whole CPUs, rounded up: "quota period" in one file, or each in its own. */
static long long quota_of_group(const char *root, const char *folder, int version)
{
    const char *const names[2][2] = {{"cpu.cfs_quota_us", "cpu.cfs_period_us"}, {"cpu.max", NULL}};
    long long values[2] = {0};
    char *line = NULL;
    size_t size = 0;
    for (int i = 0; i < 2 && names[version - 1][i]; i++) {
        FILE *file = open_file(root, folder, names[version - 1][i]);
        if (next_line(file, &line, &size)) {
            char *rest = line;
            values[i] = number(version == 2 ? strsep(&rest, " ") : line);
            if (version == 2)
                values[1] = number(rest);
        }
        if (file)
            fclose(file);
    }
    free(line);
    return values[0] && values[1] ? (values[0] - 1) / values[1] + 1 : 0;
}

/* The smallest quota from mount_point/group up to mount_point. */
static long long quota_on_the_way(const char *root, const char *mount_point, const char *group, int version)
{
    const size_t bytes = strlen(mount_point) + strlen(group) + 1;
    char *folder = malloc(bytes);
    if (!folder)
        return 0;
    snprintf(folder, bytes, "%s%s", mount_point, group);
    long long quota = 0;
    for (char *slash = folder; slash;) {
        quota = smaller(quota, quota_of_group(root, folder, version));
        if ((slash = strrchr(folder + strlen(mount_point), '/')))
            *slash = '\0';
    }
    free(folder);
    return quota;
}

/* Whether a list with commas has the item. */
static int lists(const char *list, const char *item)
{
    const size_t length = strlen(item);
    while (strncmp(list, item, length) || (list[length] && list[length] != ',')) {
        list = strchr(list, ',');
        if (!list++)
            return 0;
    }
    return 1;
}

/* \040 for a space and the like, in place. */
static void unescape(char *text)
{
    char *to = text;
    for (; *text; to++) {
        const int digits = *text == '\\' ? (int)strspn(text + 1, "01234567") : 0;
        *to = digits >= 3 ? (char)((text[1] - '0') << 6 | (text[2] - '0') << 3 | (text[3] - '0')) : *text;
        text += digits >= 3 ? 4 : 1;
    }
    *to = '\0';
}

/* Where a mount of the group `top` shows the group `path`: "" at its root, NULL if nowhere. */
static const char *group_inside(const char *path, const char *top)
{
    const size_t length = strcmp(top, "/") ? strlen(top) : 0;
    if (strncmp(path, top, length) || (path[length] && path[length] != '/'))
        return NULL;
    path += length;
    for (const char *up = path; (up = strstr(up, "/.."));) { /* out of the cgroup namespace */
        up += 3;
        if (*up == '/' || *up == '\0')
            return NULL;
    }
    return strcmp(path, "/") ? path : "";
}

/* The smallest quota that counts for the group `path`, by all mounts of its hierarchy. Where none of them shows the
 * group (a container may see its own group as the root, and be told another path), that of the roots of the mounts. */
static long long quota_of_path(const char *root, const char *path, int version)
{
    FILE *mounts = open_file(root, "proc/self", "mountinfo");
    char *line = NULL;
    size_t size = 0;
    long long seen = 0, unseen = 0;
    int shown = 0;
    while (next_line(mounts, &line, &size)) {
        /* number, parent, device, group, mount point, options; some optional fields; -; type, source, options */
        char *head = line, *tail = strstr(line, " - "), *field[5] = {NULL};
        if (!tail)
            continue;
        *tail = '\0';
        tail += 3;
        for (int i = 0; i < 5; i++)
            field[i] = strsep(&head, " ");
        const char *type = strsep(&tail, " ");
        strsep(&tail, " ");
        if (!field[4] || !tail || strcmp(type, version == 2 ? "cgroup2" : "cgroup") ||
            (version == 1 && !lists(tail, "cpu")))
            continue;
        unescape(field[3]);
        unescape(field[4]);
        const char *group = group_inside(path, field[3]);
        if (group) {
            shown = 1;
            seen = smaller(seen, quota_on_the_way(root, field[4], group, version));
        } else
            unseen = smaller(unseen, quota_on_the_way(root, field[4], "", version));
    }
    free(line);
    if (mounts)
        fclose(mounts);
    return shown ? seen : unseen;
}

int fb_quota_cpus(const char *root)
{
    FILE *groups = open_file(root, "proc/self", "cgroup");
    char *line = NULL;
    size_t size = 0;
    long long quota = 0;
    while (next_line(groups, &line, &size)) { /* number of the hierarchy : its controllers, none in version 2 : path */
        char *path = line;
        strsep(&path, ":");
        const char *controllers = strsep(&path, ":");
        if (path && *path == '/' && (*controllers == '\0' || lists(controllers, "cpu")))
            quota = smaller(quota, quota_of_path(root, path, *controllers ? 1 : 2));
    }
    free(line);
    if (groups)
        fclose(groups);
    return quota < FB_MAX_THREADS ? (int)quota : FB_MAX_THREADS;
}

int fb_available_cpus(void)
{
    cpu_set_t set;
    long long cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
    cpus = smaller(cpus, fb_quota_cpus(""));
    return cpus < 1 ? 1 : cpus < FB_MAX_THREADS ? (int)cpus : FB_MAX_THREADS;
}

#else
#if FB_THREADS
#include <unistd.h>
#endif

int fb_quota_cpus(const char *root)
{
    (void)root;
    return 0;
}

int fb_available_cpus(void)
{
#if FB_THREADS
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return cpus < 1 ? 1 : cpus < FB_MAX_THREADS ? (int)cpus : FB_MAX_THREADS;
#else
    return 1;
#endif
}
#endif
