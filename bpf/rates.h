/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Rates: whether one more SYN, RST or event fits.
 */
#ifndef RAMA_EBPF_RATES_H
#define RAMA_EBPF_RATES_H

/*
 * What a hook does about limits: only where a SYN is admitted for good is it charged, once whatever hooks it passed. That
 * is gate_cgroup; and gate_xdp for a SYN that it answers itself, which it knows only after a PEEK: it settles then.
 */
enum charge { CHARGE_NONE = 0, CHARGE_PEEK = 1, CHARGE_ADMIT = 2, CHARGE_SETTLE = 3 };

/*
 * Generic cell rate algorithm (ITU-T I.371). A bucket is one number, the time at which the next is due. Returns what that is
 * after one more at `now`, 0 if that one comes too early. Two CPUs may race on one bucket and let a few too many through; a
 * lock would cost every packet.
 */
static __always_inline u64 next_arrival(u64 due, u64 now, u64 emission, u64 tolerance)
{
	u64 arrival = due > now ? due : now, ahead = arrival - now;

	if (ahead <= tolerance)
		return arrival + emission;
	/* More than this limit itself can have let arise is the debt of an earlier one, with a lower rate: it is forgotten. */
	return ahead - tolerance > emission ? now + emission : 0;
}

/* Whether a SYN does not fit into a limit, to which it is charged if it does, as `charge` says. */
static __always_inline int exceeds(u64 emission, u64 tolerance, u32 rule, const struct packet *p, int charge)
{
	struct bucket_key key = { .rule = rule };
	u64 *stored, next, now = bpf_ktime_get_boot_ns();

	if (rule != BUCKET_GLOBAL)
		__builtin_memcpy(key.source, p->ipv4 ? p->source.b + 8 : p->source.b, 8);
	stored = buckets.lookup(&key);
	next = next_arrival(stored ? *stored : 0, now, emission, charge == CHARGE_SETTLE ? ~0ull : tolerance);
	if (!next)
		return 1;
	if (charge == CHARGE_PEEK)
		return 0;
	if (stored)
		*stored = next;
	else
		buckets.update(&key, &next);
	return 0;
}

/* Whether one more RST may be sent, which this then is. CPUs that ask at the same time may each get the last one. */
static __always_inline int may_reset(void)
{
	u32 zero = 0;
	struct reject_meter *meter = reject_meter.lookup(&zero);
	u64 next;

	if (!meter)
		return 0;
	if (!meter->limit.emission)
		return 1;
	next = next_arrival(meter->arrival, bpf_ktime_get_boot_ns(), meter->limit.emission, meter->limit.tolerance);
	if (!next)
		return 0;
	meter->arrival = next;
	return 1;
}

#endif
