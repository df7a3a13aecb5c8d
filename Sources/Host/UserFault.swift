import CLinux
import Glibc

/// Page faults of this process that one of its own threads resolves (userfaultfd).
///
/// Ranges of memory are registered; whoever touches a page there that is missing, a vCPU inside the kernel too, sleeps until a page is
/// put there (`UserFault+Placing.swift`). What is asked for is read as ``PageFault``s. Placing and reading may be done by any number
/// of threads at once.
///
/// Source: userfaultfd(2), ioctl_userfaultfd(2), the kernel's Documentation/admin-guide/mm/userfaultfd.rst.
public final class UserFault: Sendable {
    /// What the kernel's userfaultfd can do beyond missing pages of anonymous memory.
    public struct Features: OptionSet, Sendable {
        public let rawValue: UInt64
        public init(rawValue: UInt64) { self.rawValue = rawValue }

        /// Missing pages of hugetlb memory, and of shared memory.
        public static let missingHuge = Features(rawValue: UInt64(UFFD_FEATURE_MISSING_HUGETLBFS))
        public static let missingShared = Features(rawValue: UInt64(UFFD_FEATURE_MISSING_SHMEM))
        /// Pages that the file has and the page tables have not, of hugetlb memory (Linux 5.13) and shared memory (5.14).
        public static let minorHuge = Features(rawValue: UInt64(UFFD_FEATURE_MINOR_HUGETLBFS))
        public static let minorShared = Features(rawValue: UInt64(UFFD_FEATURE_MINOR_SHMEM))
        /// Writes to pages that are there can be stopped, in private memory.
        public static let writeProtection = Features(rawValue: UInt64(UFFD_FEATURE_PAGEFAULT_FLAG_WP))
        /// Private pages can change their place (Linux 6.8).
        public static let move = Features(rawValue: UInt64(GW_UFFD_FEATURE_MOVE))
        /// A fault tells the thread that it stopped.
        public static let threadID = Features(rawValue: UInt64(UFFD_FEATURE_THREAD_ID))
        /// A fault tells the byte that was touched, not only its page.
        public static let exactAddress = Features(rawValue: UInt64(UFFD_FEATURE_EXACT_ADDRESS))
    }

    /// Which accesses to a range stop.
    public struct Mode: OptionSet, Sendable {
        public let rawValue: UInt64
        public init(rawValue: UInt64) { self.rawValue = rawValue }

        /// To a page that does not exist yet.
        public static let missing = Mode(rawValue: 1 << 0)
        /// Writes to a page that was protected (``UserFault/protect(_:_:)``).
        public static let writeProtected = Mode(rawValue: 1 << 1)
        /// To a page that the file behind the range has, but that was not mapped here yet. Only shared memory.
        public static let minor = Mode(rawValue: 1 << 2)
    }

    /// What can be done in a registered range: not all memory can do all.
    public struct Operations: OptionSet, Sendable {
        public let rawValue: UInt64
        public init(rawValue: UInt64) { self.rawValue = rawValue }

        public static let wake = Operations(rawValue: 1 << _UFFDIO_WAKE)
        public static let copy = Operations(rawValue: 1 << _UFFDIO_COPY)
        /// Not of hugetlb memory: there zeroes are copied.
        public static let zero = Operations(rawValue: 1 << _UFFDIO_ZEROPAGE)
        public static let mapExisting = Operations(rawValue: 1 << _UFFDIO_CONTINUE)
    }

    /// Never blocks; readable while faults wait to be read.
    public let descriptor: Descriptor
    /// Those asked for that the kernel has.
    public let features: Features

    /// - Parameter wanted: features to turn on; those that the kernel lacks stay off.
    /// - Throws: `SystemError` with the remedy where this process may not have a userfaultfd.
    public init(wanting wanted: Features = []) throws(SystemError) {
        let supported = try Self.supportedFeatures()
        features = wanted.intersection(supported)
        descriptor = try Self.open()
        _ = try Self.handshake(descriptor, features)
    }

    /// What the kernel offers. A descriptor can be asked once only: this takes one of its own.
    /// - Throws: as the initialiser does. So it also tells whether postcopy is possible here.
    public static func supportedFeatures() throws(SystemError) -> Features { try handshake(open(), []) }

    private static func open() throws(SystemError) -> Descriptor {
        let direct = gw_userfaultfd()
        if direct >= 0 { return Descriptor(owning: direct, name: name) }
        guard direct == -EPERM else { throw refused(direct) }
        // Faults of the kernel itself must be among them, or KVM's would not be: that needs a privilege, or the device.
        guard let device = try? Descriptor.open("/dev/userfaultfd", O_RDWR) else { throw refused(direct) }
        let number = gw_userfaultfd_new(device.number, UInt(GW_UFFD_FLAGS))
        guard number >= 0 else { throw refused(number) }
        return Descriptor(owning: number, name: name)
    }

    static let name = "userfaultfd"

    /// One sentence with what the reader can do about it.
    static func refused(_ status: CInt) -> SystemError {
        let remedy =
            switch -status {
            case EPERM, EACCES:
                "run as root or with CAP_SYS_PTRACE, make /dev/userfaultfd accessible, or set vm.unprivileged_userfaultfd=1"
            case ENOSYS, EINVAL: "this kernel was built without it (CONFIG_USERFAULTFD), or is too old"
            case EMFILE, ENFILE: "raise the limit of open files"
            default: nil as String?
            }
        return SystemError("open", name, code: -status, remedy: remedy)
    }

    private static func handshake(_ descriptor: Descriptor, _ features: Features) throws(SystemError) -> Features {
        var api = uffdio_api(api: UInt64(0xaa), features: features.rawValue, ioctls: 0)
        try checked(unsafe gw_uffd_api(descriptor.number, &api), "UFFDIO_API", name)
        let needed: UInt64 = 1 << _UFFDIO_REGISTER | 1 << _UFFDIO_UNREGISTER
        guard api.ioctls & needed == needed else { throw refused(-ENOSYS) }
        return Features(rawValue: api.features)
    }

    // MARK: Ranges

    /// From now on accesses of that kind to the range stop. What exists there already stays as it is.
    ///
    /// Offsets are in bytes, multiples of the memory's page size.
    /// - Returns: what can be done there.
    /// - Throws: `SystemError`: EINVAL where the memory cannot do that, EBUSY where another userfaultfd watches it.
    @discardableResult
    public func register(_ mapping: Mapping, _ range: Range<Int>, _ mode: Mode) throws(SystemError) -> Operations {
        try register(Self.place(mapping, range), Self.words(range), mode)
    }

    /// The same for address space of this process that is no ``Mapping``'s: an ``AddressWindow``'s.
    @discardableResult
    public func register(_ addresses: Range<UInt>, _ mode: Mode) throws(SystemError) -> Operations {
        try register(Self.place(addresses), "\(addresses.count) bytes of a window", mode)
    }

    private func register(_ range: uffdio_range, _ words: String, _ mode: Mode) throws(SystemError) -> Operations {
        var request = uffdio_register()
        request.range = range
        request.mode = mode.rawValue
        try checked(
            unsafe gw_uffd_register(descriptor.number, &request), "UFFDIO_REGISTER", words,
            remedy: mode.contains(.minor) ? "minor faults need shared memory (a memfd), and Linux 5.14 or newer" : nil)
        return Operations(rawValue: request.ioctls)
    }

    /// Accesses to the range do not stop any more; whoever sleeps there is woken.
    public func unregister(_ mapping: Mapping, _ range: Range<Int>) throws(SystemError) {
        var place = Self.place(mapping, range)
        try checked(unsafe gw_uffd_unregister(descriptor.number, &place), "UFFDIO_UNREGISTER", Self.words(range))
    }

    /// The same for address space that is no ``Mapping``'s.
    public func unregister(_ addresses: Range<UInt>) throws(SystemError) {
        var place = Self.place(addresses)
        try checked(
            unsafe gw_uffd_unregister(descriptor.number, &place), "UFFDIO_UNREGISTER",
            "\(addresses.count) bytes of a window")
    }

    static func place(_ addresses: Range<UInt>) -> uffdio_range {
        uffdio_range(start: UInt64(addresses.lowerBound), len: UInt64(addresses.count))
    }

    static func place(_ mapping: Mapping, _ range: Range<Int>) -> uffdio_range {
        mapping.check(range.lowerBound, range.count)
        return uffdio_range(start: UInt64(mapping.hostAddress(at: range.lowerBound)), len: UInt64(range.count))
    }

    static func words(_ range: Range<Int>) -> String { "\(range.count) bytes at offset \(range.lowerBound)" }
}
