/*
 * garbage flood PORT RATE SECONDS: RATE connections a second from 127.0.0.2-17, each with bytes that are of no protocol.
 * garbage client PORT socks|http SECONDS TARGET-PORT: from 127.0.0.1, one after the other: connect, ask for the target,
 *   one byte there and back (http: GET), close. A client that waits 5 s has failed.
 *
 * Each prints one JSON object. Loopback only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SOURCES 16
#define OPEN 2048 /* garbage connections that are kept until the server has had its say */
#define ROOM (1 << 20)

static struct sockaddr_in at(uint32_t host, int port)
{
	return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(host), .sin_port = htons(port)};
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int dial(uint32_t source, int port, int flags)
{
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
	struct sockaddr_in from = at(source, 0), to = at(INADDR_LOOPBACK, port);
	struct timeval patience = {5, 0};
	if (fd < 0) { perror("socket"); exit(1); }
	setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	if (bind(fd, (void *)&from, sizeof from)) { perror("bind"); exit(1); }
	if (connect(fd, (void *)&to, sizeof to) && errno != EINPROGRESS) { close(fd); return -1; }
	return fd;
}

static void flood(int port, double rate, double seconds)
{
	static int open_fds[OPEN];
	static const char noise[] = "\xff\xfe\xfd\xfc garbage\r\n\r\n";
	struct linger reset = {1, 0};
	uint64_t begun = now_ns(), sent = 0, said = 0, end = begun + (uint64_t)(seconds * 1e9);
	for (int i = 0; i < OPEN; i++) open_fds[i] = -1;
	for (uint64_t now = begun; now < end; now = now_ns()) {
		uint64_t due = (uint64_t)((now - begun) / 1e9 * rate);
		for (int burst = 0; sent < due && burst < 64; sent++, burst++) {
			int fd = dial(0x7f000002 + sent % SOURCES, port, SOCK_NONBLOCK), *slot = &open_fds[sent % OPEN];
			if (fd >= 0) {
				said += send(fd, noise, sizeof noise - 1, MSG_DONTWAIT | MSG_NOSIGNAL) > 0;
				setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
			}
			if (*slot >= 0) close(*slot);
			*slot = fd;
		}
		if (sent >= due) usleep(500);
	}
	printf("{\"sent\": %llu, \"connected\": %llu}\n", (unsigned long long)sent, (unsigned long long)said);
}

static int take(int fd, char *to, int size)
{
	for (int got = 0, n; got < size; got += n)
		if ((n = recv(fd, to + got, size - got, 0)) <= 0) return 0;
	return 1;
}

static int once(int port, int http, int target)
{
	char answer[10], data[4096] = {5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, target >> 8, target & 255};
	int good = 0, fd = dial(INADDR_LOOPBACK, port, 0), n;
	if (fd < 0) return 0;
	if (http) {
		n = snprintf(data, sizeof data, "GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n", target);
		good = send(fd, data, n, MSG_NOSIGNAL) == n && take(fd, data, 12) && !memcmp(data + 9, "200", 3);
		while (good && (n = recv(fd, data, sizeof data, 0)) > 0) ;
		good = good && n == 0;
	} else {
		/* microsocks wants the request apart */
		good = send(fd, data, 3, MSG_NOSIGNAL) == 3 && take(fd, answer, 2) && answer[1] == 0;
		good = good && send(fd, data + 3, 10, MSG_NOSIGNAL) == 10 && take(fd, answer, 10) && answer[1] == 0;
		good = good && send(fd, "x", 1, MSG_NOSIGNAL) == 1 && take(fd, data, 1) && data[0] == 'x';
	}
	close(fd);
	return good;
}

static int by_size(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}

static void client(int port, int http, double seconds, int target)
{
	static uint32_t micros[ROOM];
	uint64_t begun = now_ns(), end = begun + (uint64_t)(seconds * 1e9), before;
	size_t done = 0, failed = 0;
	while ((before = now_ns()) < end && done < ROOM)
		if (once(port, http, target)) micros[done++] = (now_ns() - before) / 1000; else failed++;
	double took = (now_ns() - begun) / 1e9;
	qsort(micros, done, sizeof *micros, by_size);
	printf("{\"rate\": %.1f, \"failed\": %zu, \"p50_us\": %u, \"p99_us\": %u}\n", done / took, failed,
	       done ? micros[done / 2] : 0, done ? micros[done * 99 / 100] : 0);
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "flood"))
		flood(atoi(argv[2]), atof(argv[3]), atof(argv[4]));
	else if (argc == 6 && !strcmp(argv[1], "client"))
		client(atoi(argv[2]), !strcmp(argv[3], "http"), atof(argv[4]), atoi(argv[5]));
	else
		return fprintf(stderr, "see the beginning of garbage.c\n"), 2;
	return 0;
}
