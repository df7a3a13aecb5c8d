//! The Compression room: pages made smaller on their way, by the libraries that the machine has.
//!
//! `PageCompressor` and `PageDecompressor` are the summary. Both hold one stream for a whole migration, as QEMU's channels do: what an
//! earlier packet held may be referred to by a later one, and each packet is flushed at its end, so that it can be unpacked at once.
//! `ZlibStream` and `ZstdStream` are the libraries, opened at run time: a build needs neither.

public import Host

/// How pages are compressed. The raw value is QEMU's name (`multifd-compression`).
public enum CompressionMethod: String, Sendable, CaseIterable {
    case zlib
    case zstd

    /// The levels QEMU takes; of zstd 0 is the library's own default.
    public var levels: ClosedRange<Int> {
        switch self {
        case .zlib: 0...9
        case .zstd: 0...20
        }
    }

    /// Whether the library is here, and this level exists: to be asked before a migration begins. - Throws: `CompressionError`.
    public func check(level: Int) throws(CompressionError) {
        guard levels.contains(level) else {
            throw .level(self, level)
        }
        switch self {
        case .zlib: _ = try ZlibLibrary()
        case .zstd: _ = try ZstdLibrary()
        }
    }

    func compressor(level: Int) throws(CompressionError) -> any CompressionStream {
        guard levels.contains(level) else { throw .level(self, level) }
        return switch self {
        case .zlib: try ZlibStream(ZlibLibrary(), .compress(level: level))
        case .zstd: try ZstdStream(ZstdLibrary(), .compress(level: level))
        }
    }

    func decompressor() throws(CompressionError) -> any CompressionStream {
        switch self {
        case .zlib: try ZlibStream(ZlibLibrary(), .decompress)
        case .zstd: try ZstdStream(ZstdLibrary(), .decompress)
        }
    }
}

/// A part of a mapping, in bytes: one page or several.
public struct MemoryRange: Sendable {
    public let mapping: Mapping
    public let offset: Int
    public let count: Int

    public init(_ mapping: Mapping, offset: Int, count: Int) {
        self.mapping = mapping
        self.offset = offset
        self.count = count
    }
}

/// Why pages could not be compressed or unpacked: one sentence.
public enum CompressionError: Error, Sendable, Equatable, CustomStringConvertible {
    case library(DynamicLibraryError)
    case level(CompressionMethod, Int)
    /// The library itself gave up.
    case failed(CompressionMethod, operation: String, reason: String)
    /// Compressed pages that came from outside are no such thing.
    case damaged(CompressionMethod, reason: String)
    /// They hold that many bytes less than their pages.
    case tooShort(CompressionMethod, missing: Int)
    /// They hold more than their pages, or something follows them.
    case tooLong(CompressionMethod)

    public var description: String {
        switch self {
        case .library(let error): error.description
        case .level(let method, let level):
            "\(method.rawValue) has no level \(level); choose one from \(method.levels.lowerBound) to "
                + "\(method.levels.upperBound)"
        case .failed(let method, let operation, let reason): "\(method.rawValue): \(operation) failed: \(reason)"
        case .damaged(let method, let reason): "pages compressed with \(method.rawValue) are damaged: \(reason)"
        case .tooShort(let method, let missing):
            "pages compressed with \(method.rawValue) end \(missing) bytes before the last of them"
        case .tooLong(let method): "pages compressed with \(method.rawValue) hold more than was announced"
        }
    }
}

/// One library's stream in one direction. Not for two threads at once.
protocol CompressionStream: AnyObject {
    var method: CompressionMethod { get }
    /// Whether a byte of the source is read once and no more, so that it may change meanwhile.
    var readsOnce: Bool { get }

    /// Takes bytes from `source` and puts bytes into `room`, as many as go.
    ///
    /// - Parameter flush: everything taken so far is to come out (compressing only).
    func run(
        _ source: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer, flush: Bool
    ) throws(CompressionError) -> StreamStep

    /// Forgets all that passed: the next byte begins a new stream.
    func reset() throws(CompressionError)
}

/// What one step of a stream did.
struct StreamStep {
    var taken: Int
    var put: Int
    /// Nothing of what was to be flushed is left inside.
    var isFlushed = false
}
