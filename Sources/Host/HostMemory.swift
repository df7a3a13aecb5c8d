import Glibc
import Synchronization

/// The memory of this host.
public enum HostMemory {
    /// Physical memory in bytes.
    public static let byteCount = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE)))

    /// Whether the kernel makes transparent huge pages at all, if only where it is asked to.
    public static var hasTransparentHugePages: Bool {
        let text = (try? Descriptor.contents(of: "/sys/kernel/mm/transparent_hugepage/enabled")) ?? []
        return !text.isEmpty && !String(decoding: text, as: UTF8.self).contains("[never]")
    }

    /// Processors of this host that are in use.
    public static let processorCount = sysconf(Int32(_SC_NPROCESSORS_ONLN))

    /// Bytes that could be had now without swapping (`MemAvailable` of /proc/meminfo); all there is where the kernel does not tell.
    public static var availableByteCount: UInt64 {
        let bytes = (try? Descriptor.contents(of: "/proc/meminfo", limit: 1 << 16)) ?? []
        let line = bytes.split(separator: UInt8(ascii: "\n")).first { $0.starts(with: Array("MemAvailable:".utf8)) }
        let words = line.map { String(decoding: $0, as: UTF8.self).split(separator: " ") } ?? []
        return words.count > 1 ? UInt64(words[1]).map { $0 << 10 } ?? byteCount : byteCount
    }
}

extension Mapping {
    private static let populationStep = 64 << 20
    private static let maximumPopulationThreads = 16

    /// Takes memory for every page now instead of at its first touch, with a thread for each processor (at most 16).
    ///
    /// - Parameter isReserved: nobody else can be given it: what is available does not matter.
    /// - Throws: `SystemError` where the host has less memory available than that (nothing is taken), or what the kernel says.
    public func populate(isReserved: Bool = false) throws(SystemError) {
        let available = HostMemory.availableByteCount
        guard isReserved || UInt64(byteCount) <= available else {
            throw SystemError(
                "preallocate", "\(byteCount) bytes of memory", code: ENOMEM,
                remedy: "\(available) bytes are available; take less memory, or do not preallocate it")
        }
        let next = Atomic(0)
        let failure = Mutex<SystemError?>(nil)
        let work: @Sendable () -> Void = { [self] in
            while failure.withLock({ $0 == nil }) {
                let offset = next.wrappingAdd(Self.populationStep, ordering: .relaxed).oldValue
                guard offset < byteCount else { return }
                do throws(SystemError) {
                    try advise(.populate, at: offset, count: min(Self.populationStep, byteCount - offset))
                } catch { failure.withLock { $0 = error } }
            }
        }
        let steps = (byteCount + Self.populationStep - 1) / Self.populationStep
        let count = min(Self.maximumPopulationThreads, steps, HostMemory.processorCount)
        // One that cannot be started is no loss: this thread works as well.
        let others = (1..<max(1, count)).compactMap { try? HostThread(name: "populate\($0)", work) }
        work()
        for thread in others { thread.join() }
        if let error = failure.withLock({ $0 }) { throw error }
    }
}
