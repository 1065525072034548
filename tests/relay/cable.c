/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A bad cable between two interfaces: cable ONE OTHER LOSS DUPLICATES REORDER CORRUPT SEED. The four are of 10,000 IP
 * packets. A packet out of order is held for 1 to 8 ms. What is corrupted has a checksum that says so; a packet whose
 * checksum is still to be computed (offloads) stays as it is. ARP and neighbour discovery pass.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HELD = 512, FRAME = 70000, HEADER = sizeof(struct virtio_net_hdr) };

static unsigned long long seed;
static struct held {
	long long due; /* us; 0: free */
	int to, size;
	unsigned char *frame;
} held[HELD];
static unsigned char frame[HEADER + FRAME];

static unsigned dice(void)
{
	seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
	return seed % 10000;
}

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000ll + t.tv_nsec / 1000;
}

static int plug(const char *name)
{
	struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = if_nametoindex(name)};
	int one = 1, room = 8 << 20, fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
	if (fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) ||
	    setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) || bind(fd, (void *)&at, sizeof at)) {
		perror(name);
		exit(1);
	}
	return fd;
}

static void put(int fd, const unsigned char *bytes, int size)
{
	if (send(fd, bytes, size, 0) < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EMSGSIZE && errno != EINVAL) {
		perror("send");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	int fds[2], loss, duplicates, reorder, corrupt;
	if (argc != 8)
		return 2;
	for (int i = 0; i < 2; i++)
		fds[i] = plug(argv[1 + i]);
	loss = atoi(argv[3]), duplicates = atoi(argv[4]), reorder = atoi(argv[5]), corrupt = atoi(argv[6]);
	seed = atoll(argv[7]) * 2654435761u + 88172645463325252ull;
	puts("ready");
	fflush(stdout);
	for (;;) {
		struct pollfd ready[2] = {{fds[0], POLLIN, 0}, {fds[1], POLLIN, 0}};
		long long next = -1, time = now();
		for (int i = 0; i < HELD; i++) {
			if (held[i].due && held[i].due <= time) {
				put(held[i].to, held[i].frame, held[i].size);
				free(held[i].frame);
				held[i].due = 0;
			} else if (held[i].due && (next < 0 || held[i].due < next)) {
				next = held[i].due;
			}
		}
		poll(ready, 2, next < 0 ? -1 : (int)((next - time) / 1000 + 1));
		for (int i = 0; i < 2; i++) {
			int size, ip, at, to = fds[!i];
			if (!(ready[i].revents & POLLIN) || (size = recv(fds[i], frame, sizeof frame, MSG_DONTWAIT)) < HEADER + 34)
				continue;
			struct virtio_net_hdr *offload = (void *)frame;
			unsigned char *packet = frame + HEADER;
			ip = packet[12] << 8 | packet[13];
			at = ip == ETH_P_IP ? 34 : 54;
			if ((ip != ETH_P_IP && ip != ETH_P_IPV6) || (ip == ETH_P_IPV6 && packet[20] != 6)) {
				put(to, frame, size);
				continue;
			}
			if ((int)dice() < loss)
				continue;
			if ((int)dice() < duplicates)
				put(to, frame, size);
			if ((int)dice() < corrupt && !(offload->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && size - HEADER > at) {
				packet[at + dice() % (size - HEADER - at)] ^= 1 << dice() % 8;
				offload->flags = 0; /* not "the checksum was found to be right" */
			}
			if ((int)dice() < reorder) {
				int free_one = 0;
				while (free_one < HELD && held[free_one].due)
					free_one++;
				if (free_one < HELD) {
					held[free_one] = (struct held){now() + 1000 + dice() * 7 / 10, to, size, malloc(size)};
					memcpy(held[free_one].frame, frame, size);
					continue;
				}
			}
			put(to, frame, size);
		}
	}
}
