/*
 * The smallest guest: does what the kernel parameter test=<mode> says, without an agent.
 *
 *   up      says so on the console and powers off
 *   panic   says so and ends, which makes the kernel panic
 *   idle    says so and stays
 *   disk    waits for a SCSI disk to come, says its serial and first bytes, waits for it to go, powers off
 *   dial    opens a control connection to the host and sends back what it gets; at the end of input powers off
 *   stream  opens the connection named by token=<32 hex digits>, writes bytes=<n>, waits for the host to close, powers off
 *   sink    opens the connection named by token=..., reads to the end, says how much on the console, powers off
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static char cmdline[4096];

static const char *param(const char *key)
{
	static char value[256];
	const char *at = strstr(cmdline, key);
	if (!at)
		return "";
	sscanf(at + strlen(key), "%255s", value);
	return value;
}

static void say(const char *format, const char *text)
{
	printf(format, text);
	fflush(stdout);
}

static void power_off(void)
{
	sync();
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}

static int dial(unsigned char kind, const char *token)
{
	unsigned char preamble[24] = { 'B', 'L', 'K', 'H', 1, kind };
	for (int i = 0; i < 16 && token[2 * i]; i++)
		sscanf(token + 2 * i, "%2hhx", &preamble[8 + i]);
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = strtoul(param("bulkhead.port="), 0, 10) };
	if (connect(fd, (struct sockaddr *)&host, sizeof host) < 0 || write(fd, preamble, sizeof preamble) != sizeof preamble) {
		say("dial failed: %s\n", strerror(errno));
		power_off();
	}
	return fd;
}

static void disk(void)
{
	const char *path = "/sys/block/sda/device/vpd_pg80";
	unsigned char page[64] = { 0 };
	struct stat info;
	say("%s\n", "waiting for a disk");
	int fd;
	while ((fd = open(path, O_RDONLY)) < 0)
		usleep(1000);
	ssize_t length = read(fd, page, sizeof page - 1);
	close(fd);
	say("serial %s\n", length > 4 ? (char *)page + 4 : "?");
	char start[17] = { 0 };
	while ((fd = open("/dev/sda", O_RDONLY)) < 0)
		usleep(1000);
	if (read(fd, start, 16) < 0)
		say("read failed: %s\n", strerror(errno));
	close(fd);
	say("content %s\n", start);
	int delete = open("/sys/block/sda/device/delete", O_WRONLY);
	if (write(delete, "1", 1) != 1)
		say("delete failed: %s\n", strerror(errno));
	close(delete);
	while (stat("/sys/block/sda", &info) == 0)
		usleep(1000);
	say("%s\n", "disk is let go");
	for (;;)
		pause();
}

int main(void)
{
	static char buffer[65536];
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
	mount("proc", "/proc", "proc", 0, 0);
	mount("sysfs", "/sys", "sysfs", 0, 0);
	int console = open("/dev/console", O_RDWR);
	dup2(console, 1);
	dup2(console, 2);
	int fd = open("/proc/cmdline", O_RDONLY);
	if (read(fd, cmdline, sizeof cmdline - 1) < 0)
		return 1;
	close(fd);

	char mode[32];
	strncpy(mode, param("test="), sizeof mode - 1);
	say("mini guest: %s\n", mode);
	if (!strcmp(mode, "panic"))
		return 1;
	if (!strcmp(mode, "disk"))
		disk();
	while (!strcmp(mode, "idle"))
		pause();
	if (!strcmp(mode, "dial")) {
		ssize_t length;
		fd = dial(0, "");
		while ((length = read(fd, buffer, sizeof buffer)) > 0)
			if (write(fd, buffer, length) != length)
				break;
	}
	if (!strcmp(mode, "stream")) {
		fd = dial(1, param("token="));
		uint64_t left = strtoull(param("bytes="), 0, 10), at = 0;
		while (left) {
			/* The longest frame of the agent's, with its header. */
			size_t part = left < 28676 ? left : 28676;
			for (size_t i = 0; i < part; i++)
				buffer[i] = (at + i) % 251;
			ssize_t length = write(fd, buffer, part);
			if (length <= 0)
				break;
			left -= length;
			at += length;
		}
		while (read(fd, buffer, sizeof buffer) > 0)
			;
		say("%s\n", "host has closed");
	}
	if (!strcmp(mode, "sink")) {
		uint64_t total = 0, wrong = 0;
		ssize_t length;
		char text[64];
		fd = dial(1, param("token="));
		while ((length = read(fd, buffer, sizeof buffer)) > 0) {
			for (ssize_t i = 0; i < length; i++)
				wrong += (unsigned char)buffer[i] != (total + i) % 251;
			total += length;
		}
		snprintf(text, sizeof text, "%llu wrong %llu", (unsigned long long)total, (unsigned long long)wrong);
		say("received %s\n", text);
	}
	power_off();
}
